"""What judges this project: planted faults, changed lines, the study of the bound, the ladder."""
