"""Operators of one runtime alone, in the place of standard ones, where they are measured to be faster."""
