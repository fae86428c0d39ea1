"""Slots of whole videos as data, and scores of what is predicted of them."""
