"""Exchange with other tools: import and export trained networks, and export images, in the field's formats."""
