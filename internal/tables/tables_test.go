package tables

import "testing"

func TestPut(t *testing.T) {
	in := Table{Name: "x", Head: Row{"a", "b", "c"}}
	got := "<!-- x -->\n<!-- /x -->"
	var err error
	for _, r := range []Row{{"2", "2", "old"}, {"1", "1", "only"}, {"2", "2", "new"}} {
		if got, err = in.put(got, r); err != nil {
			t.Fatal(err)
		}
	}
	if want := "<!-- x -->\n| a | b | c |\n|---|---|---|\n| 1 | 1 | only |\n| 2 | 2 | new |\n<!-- /x -->"; got != want {
		t.Errorf("%s", got)
	}
	if _, err := in.put("nothing", Row{"1", "1", ""}); err == nil {
		t.Error("a page without the table takes it")
	}
}
