package dev.mobilevd.core;

import java.util.List;

/**
 * The result of a run.
 *
 * @param frames (T, 3, height, width), RGB, about [-1, 1], not clamped; {@link ImagePrep#toArgb} converts them
 * @param pipeline has T, height, width and frames per second
 * @param runs one per component, in running order
 */
public record Clip(float[] frames, Manifest.PipelineSpec pipeline, List<ComponentRun> runs) {}
