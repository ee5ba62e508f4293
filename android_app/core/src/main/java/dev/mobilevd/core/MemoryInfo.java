package dev.mobilevd.core;

/** Memory of the device. */
@FunctionalInterface
public interface MemoryInfo {
    /** Bytes available before the system closes apps, and bytes in total. */
    record Snapshot(long availableBytes, long totalBytes) {}

    /** Read the current values. */
    Snapshot read();
}
