"""The trainer: adapts a pretrained image model to labelled pictures, in a pod or in a local process."""
