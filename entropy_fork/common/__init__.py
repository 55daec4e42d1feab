"""What every room uses: errors, whole files, foreign text, progress, recipes. It imports no other room."""
