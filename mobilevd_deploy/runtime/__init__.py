"""Running a model: runners of one component, the pipeline that wires them, noise, pictures and clips."""
