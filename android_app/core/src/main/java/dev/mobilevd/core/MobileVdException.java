package dev.mobilevd.core;

import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Locale;

/** The only checked exception of this package: a {@link Problem} and what its sentence speaks of. */
public final class MobileVdException extends Exception {
    private static final long serialVersionUID = 1;

    private final Problem problem;
    private final transient List<Object> arguments;

    /** A problem without a cause of its own. */
    public MobileVdException(Problem problem, Object... arguments) {
        this(null, problem, arguments);
    }

    /** A problem that {@code cause} made. */
    public MobileVdException(Throwable cause, Problem problem, Object... arguments) {
        super(String.format(Locale.ROOT, problem.pattern(), arguments), cause);
        this.problem = problem;
        this.arguments = Collections.unmodifiableList(Arrays.asList(arguments.clone()));
    }

    /** What went wrong: the key to translate by. */
    public Problem problem() {
        return problem;
    }

    /** The arguments of the sentence, in order: String, Integer, Long or {@link ByteSize}. */
    public List<Object> arguments() {
        return arguments;
    }

    /** The English sentence, complete. */
    @Override
    public String getMessage() {
        return super.getMessage();
    }
}
