"""What every room uses: errors, files, locks, resources, help texts; light to import."""
