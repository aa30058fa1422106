"""What this machine has and how a process lives on it: GPU, packages, folders, launchers, signals; without torch."""
