"""What a finished adapter can be turned into, read back as its target reads it and compared before it is kept."""
