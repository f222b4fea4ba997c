"""What lessons show: measured figures and drawings, there without the repository too."""
