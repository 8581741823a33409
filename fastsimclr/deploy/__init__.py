"""Trained networks put to use: exported to other formats, and run over folders of images."""

from fastsimclr.deploy.card import Card
from fastsimclr.deploy.huggingface import load_pretrained
from fastsimclr.deploy.weights import load_safetensors

__all__ = ["Card", "load_pretrained", "load_safetensors"]
