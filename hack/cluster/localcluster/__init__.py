"""A real Kubernetes on one Linux machine, from binaries compiled here and without a container engine."""
