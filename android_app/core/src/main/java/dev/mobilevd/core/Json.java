package dev.mobilevd.core;

import com.grack.nanojson.JsonParser;
import com.grack.nanojson.JsonParserException;
import com.grack.nanojson.JsonReader;
import com.grack.nanojson.JsonWriter;
import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;

/**
 * JSON as plain values: Map, List, String, Boolean, Long, Double, null.
 *
 * <p>nanojson implements RFC 8259. This class also refuses duplicate keys, numbers beyond the range of a double, deep
 * nesting and text after the value, like the Python code.
 */
final class Json {
    private static final int DEEPEST = 64;
    private static final Pattern WHOLE = Pattern.compile("-?[0-9]{1,18}");

    private Json() {}

    /** The text is not valid JSON, or violates one of the extra rules. */
    static final class Refused extends Exception {
        private static final long serialVersionUID = 1;

        Refused(String why, Throwable cause) {
            super(why, cause);
        }
    }

    /** Read UTF-8 text that contains one object. */
    static Map<String, Object> readObject(byte[] text) throws Refused {
        if (read(text) instanceof Map<?, ?> values) {
            @SuppressWarnings("unchecked") // value() creates maps with String keys only
            Map<String, Object> object = (Map<String, Object>) values;
            return object;
        }
        throw new Refused("it contains no object", null);
    }

    /** Read UTF-8 text that contains one object or array. */
    static Object read(byte[] text) throws Refused {
        try {
            String decoded = StandardCharsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(text)).toString();
            Object value = value(JsonReader.from(decoded), 0);
            // The reader stops at the end of the value; the parser refuses text after it.
            JsonParser.any().from(decoded);
            return value;
        } catch (CharacterCodingException error) {
            throw new Refused("it is not UTF-8", error);
        } catch (JsonParserException error) {
            throw new Refused(error.getMessage(), error);
        }
    }

    /** Write plain values as indented JSON in UTF-8, with a newline at the end. */
    static byte[] write(Map<String, ?> object) {
        String text = JsonWriter.indent("  ").string().value(object).done() + "\n";
        return text.getBytes(StandardCharsets.UTF_8);
    }

    private static Object value(JsonReader reader, int depth) throws JsonParserException, Refused {
        if (depth > DEEPEST) {
            throw new Refused("it is nested too deeply", null);
        }
        switch (reader.current()) {
            case OBJECT: {
                Map<String, Object> object = new LinkedHashMap<>();
                reader.object();
                while (reader.next()) {
                    String key = reader.key();
                    Object value = value(reader, depth + 1);
                    if (object.containsKey(key)) {
                        throw new Refused("the key \"" + key + "\" is duplicated", null);
                    }
                    object.put(key, value);
                }
                return object;
            }
            case ARRAY: {
                List<Object> array = new ArrayList<>();
                reader.array();
                while (reader.next()) {
                    array.add(value(reader, depth + 1));
                }
                return array;
            }
            default:
                return reader.current() == JsonReader.Type.NUMBER ? number(reader.value().toString()) : reader.value();
        }
    }

    private static Number number(String text) throws Refused {
        if (WHOLE.matcher(text).matches()) {
            return Long.valueOf(text);
        }
        double value = Double.parseDouble(text);
        if (Double.isInfinite(value)) {
            throw new Refused("the number " + text + " is too large", null);
        }
        return value;
    }
}
