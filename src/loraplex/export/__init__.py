"""What a finished adapter can be turned into, each result reloaded by its own loader and compared before it is kept."""
