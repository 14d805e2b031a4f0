"""`attnjax bench`: attention measured against peers on this machine. Not imported by `import attnjax`."""
