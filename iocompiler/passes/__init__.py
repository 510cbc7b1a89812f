"""The passes, one file (or folder) each; `iocompiler.pipeline` puts them in order."""
