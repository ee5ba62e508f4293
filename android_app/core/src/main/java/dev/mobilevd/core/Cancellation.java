package dev.mobilevd.core;

import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;

/**
 * Stops a run from another thread. Used once: a cancelled one stays cancelled.
 *
 * <p>A run inside ONNX Runtime ends at the next node of its graph. A context binary is one node, and loading cannot
 * be interrupted, so there the run ends when that call returns.
 */
public final class Cancellation {
    private boolean cancelled;
    private OrtSession.RunOptions running;

    /** Ask for the end; returns at once. Any thread. */
    public synchronized void cancel() {
        cancelled = true;
        terminate();
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

    /** Let {@link #cancel} reach this call of the runtime, until {@link #leave}. */
    synchronized void enter(OrtSession.RunOptions options) {
        running = options;
        if (cancelled) {
            terminate();
        }
    }

    /** The call is over; its options may be closed. */
    synchronized void leave() {
        running = null;
    }

    private void terminate() {
        if (running != null) {
            try {
                running.setTerminate(true);
            } catch (OrtException error) {
                throw new IllegalStateException(error); // only for options that are closed, which leave() rules out
            }
        }
    }
}
