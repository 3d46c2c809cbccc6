"""What is learned from many fits: means and ranges over seeds, pictures, a page."""
