package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertTrue;

import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import org.junit.Test;

public class ManifestTest {
    private static final Path FOLDER = Golden.VECTORS.resolve("manifests");

    private static List<Map<String, Object>> index() throws Exception {
        return Golden.objects(Json.read(Files.readAllBytes(FOLDER.resolve("index.json"))));
    }

    @Test
    public void saysOfEveryGoldenManifestWhatPythonSays() throws Exception {
        assertTrue(index().size() > 40);
        for (Map<String, Object> golden : index()) {
            byte[] text = Files.readAllBytes(FOLDER.resolve((String) golden.get("file")));
            if (golden.get("problem") == null) {
                assertEquals(4, Manifest.read(text).components().size());
            } else {
                Problem expected = Problem.valueOf((String) golden.get("problem"));
                Golden.assertFails(expected, () -> Manifest.read(text));
            }
        }
    }

    @Test
    public void readsWhatARunnerNeeds() throws Exception {
        Manifest manifest = Artifact.open(Golden.ARTIFACT).manifest();
        assertEquals("tiny", manifest.name());
        assertEquals(new Manifest.PipelineSpec(2, 16, 24, 7), manifest.pipeline());
        Manifest.Component unet = manifest.component("unet");
        assertEquals(
                new Manifest.TensorSpec(
                        "image_embeds", List.of(1L, 8L), "float32", "NC", "component:image_encoder"),
                unet.inputs().get(2));
        assertEquals("latents", unet.output().name());
        Manifest.NpuBinary binary = unet.npu().get(0);
        assertEquals("SM8650", binary.target());
        assertEquals(75, binary.arch());
        assertEquals("w8a16", binary.precision());
        assertEquals("2.40.0", binary.qnnApi());
        assertEquals("v2.51.0.260929181845", binary.sdk().toString());
        assertEquals(List.of("moved"), binary.parts().get(0).outputs());
        assertEquals(List.of("moved", "image_latents"), binary.parts().get(1).inputs());
        assertEquals("unet/SM8650/part1.bin", binary.parts().get(1).files().get("context").path());
        assertEquals(null, manifest.component("nobody"));
        long bytes = 0;
        for (Path file : Golden.files(Golden.ARTIFACT)) {
            bytes += file.getFileName().toString().startsWith("manifest.") ? 0 : Files.size(file);
        }
        assertEquals(bytes, manifest.bytes());
    }

    @Test
    public void anErrorNamesThePlace() throws Exception {
        byte[] text = Files.readAllBytes(FOLDER.resolve("missing_field.json"));
        MobileVdException error = Golden.assertFails(Problem.MANIFEST_INVALID, () -> Manifest.read(text));
        assertTrue(error.getMessage(), error.getMessage().contains("components[1].inputs[0].shape is missing"));
    }

    @Test
    public void namesTheVersionThatItCannotRead() throws Exception {
        byte[] text = Files.readAllBytes(FOLDER.resolve("unknown_version.json"));
        MobileVdException error = Golden.assertFails(Problem.MANIFEST_VERSION, () -> Manifest.read(text));
        assertEquals(List.of(2L, 1L), error.arguments());
        byte[] huge = "{\"schema_version\": 99999999999}".getBytes(StandardCharsets.UTF_8);
        Golden.assertFails(Problem.MANIFEST_VERSION, () -> Manifest.read(huge));
    }

    @Test
    public void refusesTextThatIsNotUtf8() {
        byte[] text = {'{', '"', (byte) 0xC3, '"', ':', '1', '}'};
        Golden.assertFails(Problem.MANIFEST_UNREADABLE, () -> Manifest.read(text));
    }
}
