"""From the configured model to files that engines and the router load.

Nothing here may keep a model in memory: conversion runs in a process of its own.
"""
