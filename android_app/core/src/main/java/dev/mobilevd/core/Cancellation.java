package dev.mobilevd.core;

/**
 * Cancels a run from another thread. It cannot be reset.
 *
 * <p>A run of ONNX Runtime ends at the next node of its graph. A context binary is one node, and loading cannot be
 * interrupted, so in these cases the run ends when the call returns.
 */
public final class Cancellation {
    private boolean cancelled;
    private Runnable stop;

    /** Request cancellation; returns immediately. Any thread. */
    public synchronized void cancel() {
        cancelled = true;
        if (stop != null) {
            stop.run();
        }
    }

    /** Whether {@link #cancel} was called. Any thread. */
    public synchronized boolean isCancelled() {
        return cancelled;
    }

    /** Throws {@link Problem#CANCELLED} if {@link #cancel} was called. */
    public void check() throws MobileVdException {
        if (isCancelled()) {
            throw new MobileVdException(Problem.CANCELLED);
        }
    }

    /** Make {@link #cancel} call {@code stop}, which ends a blocking call, until {@link #leave}. One at a time. */
    public synchronized void enter(Runnable stop) {
        this.stop = stop;
        if (cancelled) {
            stop.run();
        }
    }

    /** The blocking call returned; {@code stop} is not called from now on. */
    public synchronized void leave() {
        stop = null;
    }
}
