"""What the checkout needs to test and show itself: a host, a tiny model, a demo.

Nothing in here is part of the node pack, and the pack imports nothing from here.
"""
