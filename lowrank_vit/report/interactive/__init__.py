"""What the page draws in a browser: its data, embedded compressed, the script, and the library that draws."""
