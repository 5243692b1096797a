# The page installs all that it needs.
