package dev.mobilevd.core;

/** Told how far a long job is, on the thread that does it. */
@FunctionalInterface
public interface Progress {
    /** {@code done} of {@code total} bytes; {@code done} never falls and ends at {@code total}. */
    void at(long done, long total);

    /** For those who do not want to know. */
    Progress NONE = (done, total) -> {};
}
