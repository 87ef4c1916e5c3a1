"""Views: JSON documents shown to people, in the terminal and as HTML."""
