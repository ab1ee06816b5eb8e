// Package archtest holds the storeys of the project as values, with a reason
// for each rule, and the tests that keep the source to them.
package archtest
