"""Pictures for reports: one function a picture, numbers in, one file out."""
