"""Consistency boundaries: state that is rebuilt from one stream, and decides what is appended."""
