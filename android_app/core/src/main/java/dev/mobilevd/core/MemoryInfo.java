package dev.mobilevd.core;

/** How much memory the device has; an app asks its system. */
@FunctionalInterface
public interface MemoryInfo {
    /** Bytes that can be used now without the system closing apps, and bytes in all. */
    record Snapshot(long availableBytes, long totalBytes) {}

    /** Look now. */
    Snapshot read();
}
