package testkit

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// tokenAuth is the token flow of the distribution specification: 401 with a
// realm, a GET of the realm with basic credentials, a bearer token back.
type tokenAuth struct {
	user, password string
	token          string
	issued         int
}

// RequireToken makes the proxy ask for a bearer token, which its own /token
// hands out to whoever shows user and password.
func (p *Proxy) RequireToken(user, password string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.auth = &tokenAuth{user: user, password: password, token: "made-up-" + p.Addr}
}

// ExpireTokens makes every token handed out so far worthless.
func (p *Proxy) ExpireTokens() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.auth.token += "x"
}

// TokensIssued is how often /token was asked successfully.
func (p *Proxy) TokensIssued() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.auth.issued
}

// authorize answers what has no valid token, and reports whether it did.
func (p *Proxy) authorize(w http.ResponseWriter, r *http.Request) (answered bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.auth == nil {
		return false
	}
	if r.URL.Path == "/token" {
		p.handOut(w, r)
		return true
	}
	if strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ") == p.auth.token {
		return false
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="proxy",scope="%s"`, p.Addr, scopeOf(r)))
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
	return true
}

func (p *Proxy) handOut(w http.ResponseWriter, r *http.Request) {
	user, password, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		// The OAuth2 form of the same question.
		user, password = r.FormValue("username"), r.FormValue("password")
	}
	if user != p.auth.user || password != p.auth.password {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}`, http.StatusUnauthorized)
		return
	}
	p.auth.issued++
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"token":%q,"access_token":%q,"expires_in":300,"issued_at":%q}`, p.auth.token, p.auth.token, time.Now().UTC().Format(time.RFC3339))
}

// scopeOf names what a request needs: "repository:lib/busybox:pull".
func scopeOf(r *http.Request) string {
	repo := strings.TrimPrefix(r.URL.Path, "/v2/")
	for _, end := range []string{"/manifests/", "/blobs/", "/tags/"} {
		if at := strings.LastIndex(repo, end); at >= 0 {
			repo = repo[:at]
		}
	}
	actions := "pull"
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		actions = "pull,push"
	}
	return "repository:" + repo + ":" + actions
}

// HalfOpen is a listener whose connections are accepted by the kernel and
// never served: what a client sees of a machine that lost power after the
// handshake. It returns host:port.
func HalfOpen(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}
