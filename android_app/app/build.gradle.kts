import java.util.zip.Deflater
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream

plugins {
    alias(libs.plugins.android.application)
}

val pyproject = providers.fileContents(rootProject.layout.projectDirectory.file("../pyproject.toml")).asText
val release = Regex("(?m)^version = \"(.+)\"$").find(pyproject.get())!!.groupValues[1]

android {
    namespace = "dev.mobilevd.demo"
    compileSdk = libs.versions.android.compileSdk.get().toInt()

    defaultConfig {
        applicationId = "dev.mobilevd.demo"
        targetSdk = libs.versions.android.targetSdk.get().toInt()
        // 1.2.3 has the code 10203.
        versionCode = release.split(".").fold(0) { code, part -> code * 100 + part.toInt() }
        versionName = release
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    flavorDimensions += "runtime"
    productFlavors {
        create("cpu") {
            dimension = "runtime"
            minSdk = libs.versions.android.minSdk.cpu.get().toInt()
            ndk.abiFilters += listOf("arm64-v8a", "x86_64")
        }
        create("npu") {
            dimension = "runtime"
            minSdk = libs.versions.android.minSdk.npu.get().toInt()
            ndk.abiFilters += listOf("arm64-v8a")
        }
    }

    // Gradle merges the libraries' manifests; this one removes ONNX Runtime's telemetry.
    sourceSets {
        getByName("cpu").manifest.srcFile("src/gradle/AndroidManifest.xml")
        getByName("npu").manifest.srcFile("src/gradle/AndroidManifest.xml")
    }

    // The DSP opens its libraries by path. The app needs neither the HTP compiler (90 MB) nor the other backends.
    packaging.jniLibs {
        useLegacyPackaging = true
        excludes += listOf("**/libQnnHtpPrepare.so", "**/libQnnGpu*.so", "**/libQnnDsp*.so", "**/libQnnCpu.so")
    }

    testOptions.unitTests.isIncludeAndroidResources = true
}

dependencies {
    implementation(project(":core"))
    implementation(libs.nanojson)
    implementation(libs.onnxruntime.android)
    "npuImplementation"(libs.qnn.plugin)
    "npuImplementation"(libs.qnn.runtime)
    testImplementation(libs.onnxruntime.jvm)
    testImplementation(libs.junit)
    testImplementation(libs.robolectric)
}

// Unit tests run on the desktop build of ONNX Runtime, which has the same classes.
configurations.matching { it.name.endsWith("UnitTestRuntimeClasspath") }.configureEach {
    exclude(mapOf("group" to "com.microsoft.onnxruntime", "module" to "onnxruntime-android"))
}

/** Packs an exported artifact as `artifacts/demo.mvd`: manifest.json first, stored. Without an artifact it packs nothing. */
abstract class BundleArtifact : DefaultTask() {
    @get:InputFiles
    @get:PathSensitive(PathSensitivity.RELATIVE)
    abstract val files: ConfigurableFileCollection

    @get:Internal
    abstract val folder: DirectoryProperty

    @get:OutputDirectory
    abstract val assets: DirectoryProperty

    @TaskAction
    fun pack() {
        val root = folder.get().asFile
        val target = assets.get().asFile.resolve("artifacts/demo.mvd")
        target.delete()
        if (files.isEmpty) {
            return
        }
        target.parentFile.mkdirs()
        ZipOutputStream(target.outputStream()).use { zip ->
            zip.setLevel(Deflater.NO_COMPRESSION)
            val names = files.files.map { it.relativeTo(root).invariantSeparatorsPath }
            for (name in names.sortedWith(compareBy({ it != "manifest.json" }, { it }))) {
                zip.putNextEntry(ZipEntry(name).apply { time = 0 })
                root.resolve(name).inputStream().use { it.copyTo(zip) }
            }
        }
    }
}

androidComponents {
    onVariants { variant ->
        // `make artifacts` exports both.
        val name = if (variant.flavorName == "npu") "npu" else "artifact"
        val demo = rootProject.layout.projectDirectory.dir("../build/demo/$name")
        val title = variant.name.replaceFirstChar { it.uppercase() }
        val bundle = tasks.register("bundle${title}Artifact", BundleArtifact::class.java) {
            folder.set(demo)
            files.from(demo.asFileTree)
        }
        variant.sources.assets?.addGeneratedSourceDirectory(bundle, BundleArtifact::assets)
    }
}
