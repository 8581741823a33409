"""Detection and segmentation: a pretrained encoder as the body of torchvision's Faster R-CNN and FCN, fine-tuned."""
