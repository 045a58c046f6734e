"""The figures that the page draws in a browser: their data, embedded and compressed, the script, and the library."""
