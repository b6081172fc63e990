"""Pure builders of child manifests, one kind each."""
