"""What the recipes are made of; nothing here is run by itself."""
