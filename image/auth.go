package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"

	"varve.dev/errdefs"
)

// Credentials finds the user and secret for a registry. An empty user with a
// secret is an identity token; both empty means anonymous.
type Credentials func(ctx context.Context, registry string) (user, secret string, err error)

// dockerHub is the key under which docker keeps the login of docker.io.
const (
	dockerHub     = "https://index.docker.io/v1/"
	dockerHubHost = "registry-1.docker.io"
)

// helperTime bounds a credential helper. Some ask a person for a password;
// one that waits for a screen that is not there must not hang a pull.
const helperTime = 30 * time.Second

// DockerCredentials reads docker's config.json in dir and asks the credential
// helpers it names. dir "" is DOCKER_CONFIG or ~/.docker. No file means
// anonymous. The file is read anew for each registry: a login is seen at once.
func DockerCredentials(dir string) Credentials {
	if dir == "" {
		dir = config.Dir()
	}
	return func(ctx context.Context, registry string) (string, string, error) {
		file, err := loadDockerConfig(dir)
		if err != nil || file == nil {
			return "", "", err
		}
		auth, err := askHelper(ctx, file, registry)
		if err != nil {
			return "", "", fmt.Errorf("credentials for %s: %w", registry, err)
		}
		if auth.IdentityToken != "" {
			return "", auth.IdentityToken, nil
		}
		return auth.Username, auth.Password, nil
	}
}

func loadDockerConfig(dir string) (*configfile.ConfigFile, error) {
	path := filepath.Join(dir, config.ConfigFileName)
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("docker config: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer f.Close()
	file := configfile.New(path)
	if err := file.LoadFromReader(f); err != nil {
		return nil, fmt.Errorf("docker config %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return file, nil
}

func askHelper(ctx context.Context, file *configfile.ConfigFile, registry string) (types.AuthConfig, error) {
	if registry == dockerHubHost || registry == "docker.io" {
		registry = dockerHub
	}
	type answer struct {
		auth types.AuthConfig
		err  error
	}
	// The helper's client takes no context: after the deadline the call is
	// left to itself.
	got := make(chan answer, 1)
	go func() {
		auth, err := file.GetAuthConfig(registry)
		got <- answer{auth, err}
	}()
	timer := time.NewTimer(helperTime)
	defer timer.Stop()
	select {
	case a := <-got:
		if a.err != nil {
			return a.auth, fmt.Errorf("%w: %w", a.err, errdefs.ErrUnavailable)
		}
		return a.auth, nil
	case <-timer.C:
		return types.AuthConfig{}, fmt.Errorf("the credential helper did not answer within %s: %w", helperTime, errdefs.ErrUnavailable)
	case <-ctx.Done():
		return types.AuthConfig{}, ctx.Err()
	}
}
