"""The processes of one run: how torchrun starts them, and what they exchange."""
