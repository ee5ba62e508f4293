package dev.mobilevd.core;

import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Locale;

/** The only checked exception of this package: a {@link Problem} and the arguments of its sentence. */
public final class MobileVdException extends Exception {
    private static final long serialVersionUID = 1;

    private final Problem problem;
    private final transient List<Object> arguments;

    /** A problem without a cause. */
    public MobileVdException(Problem problem, Object... arguments) {
        this(null, problem, arguments);
    }

    /** A problem with a cause. */
    public MobileVdException(Throwable cause, Problem problem, Object... arguments) {
        super(String.format(Locale.ROOT, problem.pattern(), arguments), cause);
        this.problem = problem;
        this.arguments = Collections.unmodifiableList(Arrays.asList(arguments.clone()));
    }

    /** The problem, which is also the key of its translations. */
    public Problem problem() {
        return problem;
    }

    /** The arguments of the sentence: String, Integer, Long or {@link ByteSize}. */
    public List<Object> arguments() {
        return arguments;
    }

    /** This problem as a reason not to use the NPU, if it is a failed run on the NPU; else itself. */
    MobileVdException onNpu() {
        switch (problem) {
            case RUN_FAILED:
                return new MobileVdException(this, Problem.NPU_RUN_FAILED, arguments.toArray());
            case OUTPUT_NOT_FINITE:
                return new MobileVdException(this, Problem.NPU_NOT_FINITE, arguments.toArray());
            default:
                return this;
        }
    }

    /** The complete English sentence. */
    @Override
    public String getMessage() {
        return super.getMessage();
    }
}
