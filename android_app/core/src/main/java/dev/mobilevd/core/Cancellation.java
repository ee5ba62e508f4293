package dev.mobilevd.core;

import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;

/**
 * Cancels a run from another thread. It cannot be reset.
 *
 * <p>A run of ONNX Runtime ends at the next node of its graph. A context binary is one node, and loading cannot be
 * interrupted, so in these cases the run ends when the call returns.
 */
public final class Cancellation {
    private boolean cancelled;
    private OrtSession.RunOptions running;

    /** Request cancellation; returns immediately. Any thread. */
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

    /** Make {@link #cancel} terminate this call of the runtime, until {@link #leave}. */
    synchronized void enter(OrtSession.RunOptions options) {
        running = options;
        if (cancelled) {
            terminate();
        }
    }

    /** The call returned; its options may be closed. */
    synchronized void leave() {
        running = null;
    }

    private void terminate() {
        if (running != null) {
            try {
                running.setTerminate(true);
            } catch (OrtException error) {
                throw new IllegalStateException(error); // only for closed options, which leave() prevents
            }
        }
    }
}
