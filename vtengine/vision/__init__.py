"""Images in, vision-tower rows out. Import the modules directly: `plan` and `errors` need the standard library only."""
