package dev.mobilevd.core;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import java.util.regex.Pattern;

/**
 * The fields of one JSON object of the manifest. Each can be taken once; every error names the field's path.
 *
 * <p>All methods throw {@link Problem#MANIFEST_INVALID} for a field that is missing or of another type.
 */
final class Fields {
    private final String place;
    private final Map<String, Object> left;

    private Fields(String place, Map<?, ?> values) {
        this.place = place;
        left = new LinkedHashMap<>();
        values.forEach((key, value) -> left.put((String) key, value));
    }

    /** Converts an object to a T. */
    interface Reader<T> {
        T read(Fields fields) throws MobileVdException;
    }

    /** Read a whole object; a field that {@code reader} did not take is an error. */
    static <T> T read(String place, Object value, Reader<T> reader) throws MobileVdException {
        Fields fields = new Fields(place, as(Map.class, place, value));
        T made = reader.read(fields);
        if (!fields.left.isEmpty()) {
            throw invalid(place + " has no field \"" + new TreeSet<>(fields.left.keySet()).first() + "\"");
        }
        return made;
    }

    static MobileVdException invalid(String what) {
        return new MobileVdException(Problem.MANIFEST_INVALID, what);
    }

    /** The path of a field, for errors. */
    String at(String key) {
        return place.isEmpty() ? key : place + "." + key;
    }

    boolean has(String key) {
        return left.containsKey(key);
    }

    /** Take a field of any type. */
    Object any(String key) throws MobileVdException {
        if (!left.containsKey(key)) {
            throw invalid(at(key) + " is missing");
        }
        return left.remove(key);
    }

    /** Take a field that this reader does not need; only its type is checked. */
    void skip(String key, Class<?> kind) throws MobileVdException {
        as(kind, at(key), any(key));
    }

    String string(String key) throws MobileVdException {
        return as(String.class, at(key), any(key));
    }

    String string(String key, Pattern allowed) throws MobileVdException {
        String value = string(key);
        if (!allowed.matcher(value).matches()) {
            throw invalid(at(key) + ": \"" + value + "\" is not allowed");
        }
        return value;
    }

    /** Take an optional string that must have this value. */
    void only(String key, String value) throws MobileVdException {
        if (has(key) && !value.equals(any(key))) {
            throw invalid(at(key) + " is not \"" + value + "\"");
        }
    }

    long integer(String key, long least) throws MobileVdException {
        return integer(at(key), any(key), least);
    }

    static long integer(String place, Object value, long least) throws MobileVdException {
        if (!(value instanceof Long number)) {
            throw invalid(place + " is not an integer");
        }
        if (number < least) {
            throw invalid(place + ": " + number + " is less than " + least);
        }
        return number;
    }

    int smallInteger(String key, int least) throws MobileVdException {
        long value = integer(key, least);
        if (value > Integer.MAX_VALUE) {
            throw invalid(at(key) + ": " + value + " is too large");
        }
        return (int) value;
    }

    /** Take an optional pair of increasing numbers; null if it is missing or null. */
    List<Double> range(String key) throws MobileVdException {
        Object value = has(key) ? any(key) : null;
        if (value == null) {
            return null;
        }
        List<Double> bounds = new ArrayList<>();
        for (Object bound : as(List.class, at(key), value)) {
            bounds.add(bound instanceof Number number ? number.doubleValue() : Double.NaN);
        }
        if (bounds.size() != 2 || !(bounds.get(0) < bounds.get(1))) {
            throw invalid(at(key) + " is not a range");
        }
        return bounds;
    }

    <T> List<T> list(String key, Reader<T> reader) throws MobileVdException {
        List<T> items = new ArrayList<>();
        for (Object value : as(List.class, at(key), any(key))) {
            items.add(read(at(key) + "[" + items.size() + "]", value, reader));
        }
        return List.copyOf(items);
    }

    List<String> strings(String key) throws MobileVdException {
        List<String> items = new ArrayList<>();
        for (Object value : as(List.class, at(key), any(key))) {
            items.add(as(String.class, at(key) + "[" + items.size() + "]", value));
        }
        return List.copyOf(items);
    }

    <T> Map<String, T> map(String key, Reader<T> reader) throws MobileVdException {
        Map<String, T> items = new LinkedHashMap<>();
        for (Map.Entry<?, ?> entry : ((Map<?, ?>) as(Map.class, at(key), any(key))).entrySet()) {
            String name = (String) entry.getKey();
            items.put(name, read(at(key) + "." + name, entry.getValue(), reader));
        }
        return items;
    }

    /** Return {@code value} as a {@code type}. */
    static <T> T as(Class<T> type, String place, Object value) throws MobileVdException {
        if (!type.isInstance(value)) {
            String kind = type == Map.class ? "an object" : type == List.class ? "a list" : "a string";
            throw invalid((place.isEmpty() ? "it" : place) + " is not " + kind);
        }
        return type.cast(value);
    }
}
