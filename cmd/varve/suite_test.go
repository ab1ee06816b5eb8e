package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"varve.dev/internal/testkit"
)

// suiteTests are some of BuildKit's own tests of each of its parts. All of them
// are `make buildkit-suite`.
const suiteTests = `Test(DockerfileDirs|AddArchive|CopyWildcardCache|CopyLinkDotDestDir|CacheImportExport|ImageManifestCacheImportExport|` +
	`CacheMultiPlatformImportExport|CacheMountSharing|MountRWCache|RunHeredoc|ExportMultiPlatform|TarExporterMulti|HistoryError|HistoryFinalizeTrace|` +
	`GatewayBuiltinSyntaxSourceDockerfileV0|FrontendInputs|FrontendSubrequests|NamedOCILayoutContext|NamedFilteredContext|SourcePolicyWithNamedContext|` +
	`OnBuildNamedContext|MultiPlatformProvenance|SBOMScannerImage|SecretAsEnviron|SSHSocketParams|SourceDateEpochContextLocalUnset|ErrorsSourceMap|` +
	`RunSecurityDefault|RunHostNetwork|DeviceRunEnv|Ulimit|DockerfileFromGitSHA1|AddGitChecksumCache)`

// TestBuildKitSuite has varve take buildkitd's place for tests that were written
// for that.
func TestBuildKitSuite(t *testing.T) {
	testkit.NeedRoot(t)
	if testing.Short() {
		t.Skip("builds BuildKit's tests")
	}
	cmd := exec.Command("../../scripts/buildkit-suite", "-d", filepath.Join(testkit.Binaries(t), "varve"),
		"-o", filepath.Join(t.TempDir(), "results"), suiteTests)
	cmd.Env = append(os.Environ(), "GOFLAGS=")
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
}
