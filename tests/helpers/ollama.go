// What Ollama makes of a Modelfile and of its TEMPLATE, for tests/contract/test_ollama_template.py and standins/: one JSON object a line in, one out.
//
// Its Modelfile parser drops what does not print, neighbours of one role are joined, .System is all system messages, the
// Modelfile's SYSTEM goes before them unless the first message is one. Held once against the parser and template packages of
// Ollama 0.33.0-rc2 themselves: the same on every template and on 2,500 random ones. (parser/parser.go, template/template.go)

package main

import ("bufio"; "encoding/json"; "errors"; "fmt"; "io"; "os"; "regexp"; "sort"; "strconv"; "strings"; "text/template"; "text/template/parse"; "time")

type message struct { Role, Content, Thinking, ToolName, ToolCallID string; Images, ToolCalls []any }
type input struct { Template, System, Modelfile string; Messages []message; Raw, Think bool }

func parsed(r rune) rune {
	if strconv.IsPrint(r) || r == '\n' || r == '\r' || r == '\t' { return r }
	return -1
}

// Neighbours of one role joined, and all that system messages say.
func collate(in input) (string, []*message) {
	if in.System != "" && len(in.Messages) > 0 && in.Messages[0].Role != "system" {
		in.Messages = append([]message{{Role: "system", Content: in.System}}, in.Messages...)
	}
	var system []string
	var joined []*message
	for i := range in.Messages {
		m := in.Messages[i]
		if m.Role == "system" { system = append(system, m.Content) }
		if last := len(joined) - 1; last >= 0 && joined[last].Role == m.Role && m.Role != "tool" {
			joined[last].Content += "\n\n" + m.Content
		} else {
			joined = append(joined, &m)
		}
	}
	return strings.Join(system, "\n\n"), joined
}

// Children of a node of a parsed template, and the names that stand in it.
func parts(node parse.Node) (below []parse.Node, names []string) {
	list := func(l *parse.ListNode) { if l != nil { below = append(below, l.Nodes...) } }
	branch := func(b *parse.BranchNode) { below = append(below, b.Pipe); list(b.List); list(b.ElseList) }
	switch n := node.(type) {
	case *parse.ListNode: list(n)
	case *parse.ActionNode: below = append(below, n.Pipe)
	case *parse.IfNode: branch(&n.BranchNode)
	case *parse.RangeNode: branch(&n.BranchNode)
	case *parse.WithNode: branch(&n.BranchNode)
	case *parse.TemplateNode: if n.Pipe != nil { below = append(below, n.Pipe) }
	case *parse.PipeNode: for _, c := range n.Cmds { below = append(below, c.Args...) }
	case *parse.FieldNode: names = n.Ident
	case *parse.VariableNode: names = n.Ident
	}
	return
}

func collect(node parse.Node, found map[string]bool) {
	below, names := parts(node)
	for _, name := range names { found[strings.ToLower(name)] = true }
	for _, child := range below { collect(child, found) }
}

// What would follow an answer is no part of its prompt: everything behind the first {{ .Response }} goes.
func cut(list *parse.ListNode, done bool) bool {
	if list == nil { return done }
	for i, node := range list.Nodes {
		if done { list.Nodes = list.Nodes[:i]; break }
		switch n := node.(type) {
		case *parse.ActionNode: found := map[string]bool{}; collect(n.Pipe, found); done = found["response"]
		case *parse.IfNode: done = cut(n.ElseList, cut(n.List, done))
		case *parse.RangeNode: done = cut(n.ElseList, cut(n.List, done))
		case *parse.WithNode: done = cut(n.ElseList, cut(n.List, done))
		}
	}
	return done
}

var functions = template.FuncMap{
	"json": func(v any) string { text, _ := json.Marshal(v); return string(text) },
	"currentDate": func(...string) string { return time.Now().Format("2006-01-02") },
	"yesterdayDate": func(...string) string { return time.Now().AddDate(0, 0, -1).Format("2006-01-02") },
}

// A template without .Messages is one turn, rendered once for each.
func turns(t *template.Template, messages []*message, values map[string]any) (string, error) {
	var text strings.Builder
	turn := func() error {
		err := t.Execute(&text, values)
		values["System"], values["Prompt"], values["Response"] = "", "", ""
		return err
	}
	values["System"], values["Prompt"] = "", ""
	for _, m := range messages {
		var err error
		switch m.Role {
		case "system": if values["Prompt"] != "" || values["Response"] != "" { err = turn() }; values["System"] = m.Content
		case "user": if values["Response"] != "" { err = turn() }; values["Prompt"] = m.Content
		case "assistant": values["Response"] = m.Content
		}
		if err != nil { return "", err }
	}
	cut(t.Root, false)
	err := turn()
	return text.String(), err
}

func render(in input) (string, []string, error) {
	source := in.Template
	if !in.Raw { source = strings.Map(parsed, source) }
	t, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(source)
	if err != nil { return "", nil, err }
	found := map[string]bool{}
	for _, each := range t.Templates() { collect(each.Root, found) }
	names := []string{}
	for name := range found { names = append(names, name) }
	sort.Strings(names)
	if !found["messages"] && !found["response"] { t = template.Must(t.Parse(source + "{{ .Response }}")) }
	system, messages := collate(in)
	values := map[string]any{"System": system, "Messages": messages, "Response": "", "Think": in.Think, "ThinkLevel": "", "IsThinkSet": in.Think}
	if !found["messages"] {
		text, err := turns(t, messages, values)
		return text, names, err
	}
	var text strings.Builder
	err = t.Execute(&text, values)
	return text.String(), names, err
}

// A value ends with the first line after which it is closed: no quotes at its beginning, or the same ones at its end.
func closed(value string) (string, bool) {
	for _, quotes := range []string{`"""`, `"`} {
		if inner, there := strings.CutPrefix(value, quotes); there { return strings.CutSuffix(inner, quotes) }
	}
	return value, true
}

var known = regexp.MustCompile(`^(?i:from|license|template|system|adapter|draft|renderer|parser|parameter|message|requires)$`)
var lines = regexp.MustCompile(`[^\r\n]*[\r\n]?`)
const unknown = `(line %d): command must be one of "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message", or "requires"`

// What stands before the first space or tab of a line, whose letters are `of`; ended: a line's end came before it.
func word(line, of string) (found, rest string, ended, ok bool) {
	at := regexp.MustCompile(`^.?[` + of + `]*`).FindStringIndex(line)[1]
	if at == len(line) { return line, "", false, false }
	return line[:at], line[at+1:], line[at] == '\n' || line[at] == '\r', line[at] == ' ' || line[at] == '\t'
}

func commands(text string) ([][2]string, error) {
	found := [][2]string{}
	name, value, prefix, from := "", "", "", false
	for number, line := range lines.FindAllString(text, -1) {
		if name == "" {
			line = strings.TrimLeft(line, " \t\r\n")
			if line == "" || line[0] == '#' { continue }
			first, rest, ended, ok := word(line, "a-zA-Z")
			if first == line { return nil, io.ErrUnexpectedEOF }
			if ended { number++ } // the line's end is counted before it is looked at
			if !ok || !known.MatchString(first) { return nil, fmt.Errorf(unknown, number + 1) }
			name, line, prefix = first, rest, ""
			from = from || strings.EqualFold(first, "from")
			if strings.EqualFold(first, "parameter") || strings.EqualFold(first, "message") {
				second, rest, _, ok := word(line, "a-zA-Z0-9_")
				if !ok { return nil, fmt.Errorf("unexpected EOF: %s", second) }
				if line = rest; strings.EqualFold(first, "parameter") { name = second } else { prefix = second + ": " }
			}
		}
		value += strings.Map(parsed, line)
		if inner, ok := closed(strings.TrimSpace(value)); ok {
			found, name, value = append(found, [2]string{name, prefix + inner}), "", ""
		}
	}
	if name != "" { return nil, io.ErrUnexpectedEOF }
	if !from { return nil, errors.New("no FROM line") }
	return found, nil
}

func answer(in input) any {
	if in.Modelfile != "" {
		found, err := commands(in.Modelfile)
		if err != nil { return map[string]string{"error": err.Error()} }
		return found
	}
	text, names, err := render(in)
	if err != nil { return map[string]any{"error": err.Error(), "names": names} }
	return map[string]any{"text": text, "names": names}
}

func main() {
	input_ := bufio.NewReader(os.Stdin)
	for {
		line, err := input_.ReadBytes('\n')
		if err != nil { return }
		var in input
		if err := json.Unmarshal(line, &in); err != nil { panic(err) }
		out, _ := json.Marshal(answer(in))
		fmt.Println(string(out))
	}
}
