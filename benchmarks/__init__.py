"""Peers and iocompiler side by side: one command a group, see README.md here."""
