// Package tables writes what campaigns measured into the pages of docs: a row
// for each case, in a table that stands between two comments with its name. So
// a figure on a page is one that a command printed.
package tables

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// Table is one of a page's tables.
type Table struct {
	Page string // the file
	Name string
	Head Row
}

// Row is one line of a table. Its first two fields say what it is about: a new
// one takes the place of the one before.
type Row []string

func (r Row) String() string { return "| " + strings.Join(r, " | ") + " |" }

// Row makes a row of itself, beside what has one to tell.
func (r Row) Row() Row { return r }

// Fields checks that a section of a page, from the line that begins so to the
// next one that begins with until, names every field that the types have in JSON.
func Fields(t testing.TB, page, from, until string, types ...reflect.Type) {
	t.Helper()
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(data), "\n"+from)
	if !found {
		t.Fatalf("%s has no line that begins with %q", page, from)
	}
	section, _, _ = strings.Cut(section, "\n"+until)
	for _, of := range types {
		for f := range of.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.IsExported() && !strings.Contains(section, "`"+name+"`") {
				t.Errorf("%s: %s does not tell of %q", of, page, name)
			}
		}
	}
}

// recordVariable, in the environment, asks for the tables to be written.
const recordVariable = "VARVE_RECORD"

// Tell logs a row and, if a campaign is on record, writes it.
func (in Table) Tell(t testing.TB, r Row) {
	t.Helper()
	for i, field := range r {
		t.Logf("%s: %s", in.Head[i], field)
	}
	in.Write(t, r)
}

// Write writes rows, if a campaign is on record and went well.
func (in Table) Write(t testing.TB, rows ...Row) {
	t.Helper()
	if os.Getenv(recordVariable) == "" || t.Failed() {
		return
	}
	data, err := os.ReadFile(in.Page)
	if err != nil {
		t.Fatal(err)
	}
	page := string(data)
	for _, r := range rows {
		if page, err = in.put(page, r); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(in.Page, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Check makes sure that the page has a place for the table.
func (in Table) Check(t testing.TB) {
	t.Helper()
	data, err := os.ReadFile(in.Page)
	if err == nil {
		_, err = in.put(string(data), make(Row, len(in.Head)))
	}
	if err != nil {
		t.Error(err)
	}
}

// put returns the page with the row in its table.
func (in Table) put(page string, r Row) (string, error) {
	begin, end := "<!-- "+in.Name+" -->\n", "<!-- /"+in.Name+" -->"
	before, rest, ok := strings.Cut(page, begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return "", fmt.Errorf("%s has no place for the table %q", in.Page, in.Name)
	}
	rows := []string{in.Head.String(), "|" + strings.Repeat("---|", len(in.Head)), r.String()}
	key := r[:2].String()
	for _, line := range strings.Split(strings.TrimSpace(old), "\n")[min(2, strings.Count(old, "\n")):] {
		if line != "" && !strings.HasPrefix(line, key) {
			rows = append(rows, line)
		}
	}
	slices.Sort(rows[2:])
	return before + begin + strings.Join(rows, "\n") + "\n" + end + after, nil
}
