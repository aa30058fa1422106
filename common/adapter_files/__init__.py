"""Adapters in and out: one file per format, the writer facing the reader; other tools' files."""
