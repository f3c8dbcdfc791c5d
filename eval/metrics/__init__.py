"""Image and codebook metrics, each equal to the field's reference tool."""
