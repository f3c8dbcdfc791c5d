"""Reducing inside vision towers, and recording what they compute for reducers."""
