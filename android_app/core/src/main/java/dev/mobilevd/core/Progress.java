package dev.mobilevd.core;

/** Receives the progress of a job, on the job's thread. */
@FunctionalInterface
public interface Progress {
    /** {@code done} of {@code total} bytes; {@code done} never decreases and ends at {@code total}. */
    void at(long done, long total);

    /** Ignores everything. */
    Progress NONE = (done, total) -> {};
}
