"""What an image of the pictogram world shows, read exactly from its pixels, and whether it is what was asked for."""
